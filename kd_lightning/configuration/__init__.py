"""Configurations: what a user wrote, the parts that it becomes, and what is wrong in it."""
