"""lmkern inside other libraries; each is imported only when it is asked for."""

from __future__ import annotations


def register_transformers() -> None:
    """Make ``attn_implementation="lmkern"`` known to Hugging Face transformers.

    Once per process, before or after models are built; again, it does nothing new. Then either of ::

        AutoModel.from_pretrained(name, attn_implementation="lmkern")
        model.set_attn_implementation("lmkern")

    runs on :func:`lmkern.functional.scaled_dot_product_attention`, in every architecture that goes
    through transformers' ``AttentionInterface``: BERT, GPT-2, Llama, Mistral, T5 and most others.

    Raises:
        ImportError: transformers is missing, or older than 5.6.
    """
    from lmkern.integrations.transformers import register

    register()
