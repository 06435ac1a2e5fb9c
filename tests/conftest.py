"One torch thread a process: the tests start several processes, and threads that wait for each other on a busy machine are 30 times slower."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
