"""The formats that core writes."""
