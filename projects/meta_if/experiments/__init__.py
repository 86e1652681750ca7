"""meta-IF's experiments: each module measures one thing and emits rows."""
