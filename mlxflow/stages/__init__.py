"""One module a stage; `mlxflow.workflow.STAGES` lists them."""
