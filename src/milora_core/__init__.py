"""The parts that any engine needs to serve MiLoRA: errors, files, routing and kernels. They require only torch.

Nothing here imports transformers or PEFT.
"""
