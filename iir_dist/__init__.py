"""Instance-level image retrieval at scale: contrastive pretraining, AP fine-tuning, sharded IVF-PQ search.

Importing this package loads neither torch nor ray nor faiss; each stage loads what it needs when it runs.
"""

__version__ = "0.1.0"
