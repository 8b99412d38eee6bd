"""The parts that stages are made of."""

import logging

# The libraries import torchao, which warns of kernels that this machine cannot load and at each of its enums. Nothing here uses them.
for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(name).setLevel(logging.ERROR)
