"""DistZO2's experiments: each module measures one thing and emits rows."""
