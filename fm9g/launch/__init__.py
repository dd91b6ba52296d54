"""Starting the processes of a run, and telling why they ended."""
