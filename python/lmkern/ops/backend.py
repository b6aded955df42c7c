import os
from lmkern import _C
_simt = os.environ.get("LMKERN_SIMT")
if _simt == "1":
    from lmkern import _C_simt as _device
elif _simt == "race":
    from lmkern import _C_simt_race as _device
else:
    _device = _C
def kernels_of(tensor):
    return _device
