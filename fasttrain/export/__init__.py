"""Take a trained backbone elsewhere: one module a format, each of which reads back what it wrote."""
