"""What Linux offers for the memory of processes: userfaultfd, PAGEMAP_SCAN, soft-dirty, ptrace."""
