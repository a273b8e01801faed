"""`bench` outside of ranks: a job for each folder and engine, and the report of them all."""
