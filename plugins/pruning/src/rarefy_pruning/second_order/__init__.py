"""Pruning that corrects the weights it keeps, by the inverse Hessian of the error."""
