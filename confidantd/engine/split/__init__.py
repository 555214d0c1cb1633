"""Head groups and MLP columns of a block on several backends at once."""
