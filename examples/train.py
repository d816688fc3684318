"""Train a small Llama from Python, on the token files that `doit pretokenize` wrote."""

from pathlib import Path

from mlx_lm.models import llama

import mlxflow as mf

artifacts = Path("artifacts/pretokenize")
train, validation = (mf.TokenFile.open(artifacts / f"{name}.safetensors") for name in ("train", "validation"))
shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, vocab_size=train.vocab_size, **shape))
settings = mf.TrainingSettings(num_steps=20, warmup_steps=2, batch_size=4, learning_rate=1e-2, eval_every=10)
mf.prepare_model(model, settings, adapter_seed=0)

checkpoints = mf.CheckpointStore(Path("checkpoints"), keep=2, settings=settings.table(), say=print)
session = mf.Session(checkpoints, memory_limit_bytes=2 * 1024**3, log=print)
subject = mf.Subject(model, settings, train.vocab_size, train.context_length)
data = mf.make_data(train.rows, validation.rows, settings, seed=0)
with mf.ready_trainer(subject, subject.recorded_kernels(), data, session) as trainer:
    trainer.run()
print(mf.perplexity(model, validation.rows, batch_size=4))
