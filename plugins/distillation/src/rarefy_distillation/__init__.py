"""distillation techniques."""
