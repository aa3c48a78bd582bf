"""Model families: one file for each, with its config fields and its tensor table."""
