"""What any engine needs to serve MiLoRA, on torch alone: errors, files, routing and kernels.

Nothing here imports transformers or PEFT.
"""
