"""factorization techniques."""
