# Sourced by launch.sh: turns the variables of a training run into FLAGS. The defaults are those of A14B.

for variable in LOAD_PATH SAVE_PATH MM_DATA MM_MODEL FSDP_CONFIG; do
    printf -v "$variable" '%s' "${!variable-}"
    filled_in "$variable"
done
if [[ -n $LOAD_PATH && ! -e $LOAD_PATH ]] && ! has_flag --load "$@" && ! has_flag --from-scratch "$@" \
    && ! has_flag --help "$@" && [[ ! -e $SAVE_PATH/latest_checkpointed_iteration.txt ]]; then
    fail 4 "LOAD_PATH: there is nothing at '$LOAD_PATH'" \
        "convert the weights (mm-convert Wan2.2T2VConverter hf_to_dcp ...), set LOAD_PATH, or pass --from-scratch"
fi

KEEP_LAST=${KEEP_LAST:-3}
TP=${TP:-1} PP=${PP:-1} VP=${VP:-1} CP=${CP:-1} SP=${SP:-0} MBS=${MBS:-1} GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
for variable in TP PP VP CP MBS GRAD_ACC_STEP; do
    whole_number "$variable" 1
done
whole_number SP 0
whole_number KEEP_LAST 0

FLAGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --context-parallel-algo "${CP_ALGO:-ulysses_cp_algo}"
    --micro-batch-size "$MBS"
    --num-workers "${NUM_WORKERS:-$WORKERS}"
    --lr "${LR:-1e-5}"
    --min-lr "${MIN_LR:-${LR:-1e-5}}"
    --lr-decay-style "${LR_DECAY_STYLE:-constant}"
    --lr-warmup-iters "${WARMUP_ITERS:-0}"
    --adam-beta1 0.9
    --adam-beta2 0.999
    --adam-eps 1e-8
    --weight-decay "${WEIGHT_DECAY:-1e-2}"
    --clip-grad "${CLIP_GRAD:-1.0}"
    --optimizer-selection fused_torch_adamw
    --train-iters "${TRAIN_ITERS:-5000}"
    --distributed-timeout-minutes "${TIMEOUT_MINUTES:-20}"
    --mm-data "$MM_DATA"
    --mm-model "$MM_MODEL"
    --log-interval "${LOG_INTERVAL:-1}"
    # At most a tenth of the run is lost to a crash. MindSpeed-MM's 10000 lies beyond its 5000 iterations.
    --save-interval "${SAVE_INTERVAL:-500}"
    --ckpt-format torch_dcp
)
case ${PRECISION:-bf16} in
    bf16) FLAGS+=(--bf16) ;;
    fp32) FLAGS+=(--fp32) ;;
    *) fail 2 "PRECISION is '$PRECISION'" "set it to bf16 or fp32" ;;
esac
# EXPERT_RANKS=HIGH,LOW (or even): both experts side by side (--expert both), each on so many of the ranks.
RANKS=$WORLD_SIZE
if [[ -n ${EXPERT_RANKS:-} ]]; then
    FLAGS+=(--expert-ranks "$EXPERT_RANKS")
    if [[ $EXPERT_RANKS == even ]]; then RANKS=$((WORLD_SIZE / 2)); else RANKS=${EXPERT_RANKS%%,*}; fi
    if [[ $RANKS =~ ^[0-9]{1,9}$ ]]; then RANKS=$((10#$RANKS)); else RANKS=0; fi
fi
# A global batch is what the ranks take together; a layout that does not divide the ranks is explained by the program.
DP=$((RANKS / (TP * PP * CP)))
if [[ -n ${GBS:-} ]]; then
    whole_number GBS 1
    FLAGS+=(--global-batch-size "$GBS")
elif ((DP * TP * PP * CP == RANKS && DP > 0)); then
    FLAGS+=(--global-batch-size $((MBS * GRAD_ACC_STEP * DP)))
fi
((VP > 1)) && FLAGS+=(--virtual-pipeline-model-parallel-size "$VP")
((SP > 0)) && FLAGS+=(--sequence-parallel)
# An A14B checkpoint with optimizer state takes 160 GiB: keep the newest ones. KEEP_LAST=0 keeps all.
((KEEP_LAST > 0)) && FLAGS+=(--keep-last "$KEEP_LAST")
[[ -n ${ULYSSES_DEGREE:-} ]] && FLAGS+=(--ulysses-degree-in-cp "$ULYSSES_DEGREE")
[[ -n ${SEED:-} ]] && FLAGS+=(--seed "$SEED")
[[ -n $FSDP_CONFIG ]] && FLAGS+=(--use-torch-fsdp2 --fsdp2-config-path "$FSDP_CONFIG")
[[ -n $LOAD_PATH ]] && ! has_flag --from-scratch "$@" && FLAGS+=(--load "$LOAD_PATH")
[[ -n $SAVE_PATH ]] && FLAGS+=(--save "$SAVE_PATH")
[[ -n ${MM_TOOL:-} ]] && FLAGS+=(--mm-tool "$MM_TOOL")
true
