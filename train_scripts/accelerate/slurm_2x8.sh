#!/usr/bin/env bash
# Two nodes with eight GPUs each under SLURM. One task per node launches the eight processes of the node.
#
#   sbatch train_scripts/accelerate/slurm_2x8.sh --config train_scripts/recipes/a2_imagenet.yaml \
#       --batch-size 128 --data-dir IMAGENET --model spa_resnet50 --output RUNS --experiment spa_resnet50_a2
#
# The batch size is that of one process. The recipe's is for 8 processes: half of it keeps the global batch size.
#
# A requeued job resumes from its last checkpoint if --output and --experiment are given.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_PROCESS_IP=${hosts[0]}

output='' experiment=''
args=("$@")
for ((i = 0; i + 1 < ${#args[@]}; i++)); do
    case ${args[i]} in
        --output) output=${args[i + 1]} ;;
        --experiment) experiment=${args[i + 1]} ;;
    esac
done
last="$output/$experiment/last.pth.tar"
if [[ -n $output && -n $experiment && -f $last ]]; then
    args+=(--resume "$last")
fi

# SLURM_NODEID is only defined on each node, so the shell of the node expands it
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch --config_file train_scripts/accelerate/gpu2x8.yaml \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_PROCESS_IP" --main_process_port 29500 \
    -m timm_spa.run train "$@"' train "${args[@]}"
