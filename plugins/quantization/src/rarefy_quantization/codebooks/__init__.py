"""Codebooks of blocks of columns, codebooks fitted to what layers give, and mixtures as priors."""
