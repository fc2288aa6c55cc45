"""One module for each kind of torture: `run(job)` goes on until its goal or its time is reached."""
