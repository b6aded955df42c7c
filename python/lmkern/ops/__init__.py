"""The ops behind :mod:`lmkern.functional`: schema, implementations, autograd Function. Not public.

A raw op, ``torch.ops.lmkern.*``, has no gradient of its own; the autograd Function stands outside it.
"""
