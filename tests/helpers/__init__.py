"""What tests share: brute-force twins, tiny models, a local Hub, two processes."""

import logging


# When imported it names kernels that it would like to have; pytest would show that after its closing line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
