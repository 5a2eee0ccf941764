"""What the scripts stand on."""

import logging

# transformers 5.23 imports torchao where it is installed, and torchao 0.18.0 uses what torch 2.14.1
# calls deprecated; neither is for users of this repo to mend. To go with the next torchao.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
