"""One module a stage; `mlxflow.workflow.loader.STAGES` lists them."""
