"""The stages, one module each; `mlxflow.workflow.loader.STAGES` lists them."""
