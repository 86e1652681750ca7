"""What is measured: one module per experiment."""
