"""Mixed-modal language models with modality-aware sparsity (MoMa, arXiv 2407.21770)."""
