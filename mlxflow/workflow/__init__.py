"""The workflow: its file, the contract of a stage, the inputs of stages, and the execution of one."""
