"""Optimizers for embedding tables: a step costs as much as the rows that it used.

The classes have the names, arguments and state of torch.optim's, and ``load_state_dict`` works both
ways. They take sparse gradients (``nn.Embedding(sparse=True)``) and, but for ``SparseAdam``, dense ones,
for which they compute what torch.optim computes.

Weight decay reaches a row when the row is next used, with the factors of all steps in between.
Until then its weights lag: call ``optimizer.catch_up()`` before reading them elsewhere, for
example to evaluate or to save the model (``optimizer.state_dict()`` calls it).
"""

from lmkern.optim.adagrad import Adagrad
from lmkern.optim.adam import AdamW, SparseAdam
from lmkern.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "AdamW", "SparseAdam"]
