"""A package only so that the wheel carries the bundled artifact."""
