# shellcheck shell=bash
# NCCL and CUDA settings that both launchers source; a value from outside counts.

# PyTorch ends a rank that has waited for the others too long (the strategy's timeout, 30 minutes; within HSDP's mesh NCCL's 10), and the launcher then
# restarts all of them; the last collectives of each rank are written down.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
# Only warnings. INFO tells which network NCCL found: look for "NET/IB" on InfiniBand; "NET/Socket" is ten times slower.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# FSDP frees and allocates gathered units all the time: growing segments leave no holes between them.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# One thread a process: the loading workers have their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Not set here, because clusters differ: NCCL_SOCKET_IFNAME (the interface for the first handshake, where several exist),
# NCCL_IB_HCA (which InfiniBand cards). Wrong values are worse than none.
