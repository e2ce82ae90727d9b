#!/usr/bin/env bash
# Measure which training makes the model follow new words best, on nano with three seeds (docs/experiments.md).
# This takes an hour and a half on two cores; a stopped run continues where it was.
#   bash runs/listen.sh             three seeds      SEEDS="0" bash runs/listen.sh    one seed
# Writes out/listen/SEED/NAME.json, and the table out/listen/table.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python} OUT=${OUT:-out/listen} SEEDS=${SEEDS:-"0 1 2"}
WORDS=crimson,azure,wedge,plus,sinks,halts  # words whose meaning the base rarely shows by luck, unlike box and ascends
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # two seeds in parallel are faster than two threads
source runs/train_once.sh

te() {  # te NAME FLAGS...: train an encoder
    train_once "$1" train_te.py --data "$DATA" --keywords "$KEYS" --keyword_init own --batch 32 --lr 3e-3 \
        --keyword_lr 0.1 --shift 3 --caption_mode_probs 0,0,100 --trim_prob 0 --steps 1500 "${@:2}"
}
lora() {  # lora NAME FLAGS...: train a translator
    train_once "$1" train_lora.py --data "$DATA" --batch 16 --rank 16 --lr 4e-3 --shift 8 --steps 400 "${@:2}"
}
score() {  # score NAME FLAGS...: grade a result
    [ -e "$DIR/$1.json" ] || $PY diag.py listen --words "$KEYS" --n "${N:-34}" --seed "$((1000 + SEED))" \
        --skip_before "${@:2}" --json "$DIR/$1.json" > /dev/null
    [ -e "$DIR/$1.logits.json" ] || [ $# = 1 ] || \
        $PY diag.py logits "${@:2}" --data "$DATA" --n 3 --json "$DIR/$1.logits.json" > /dev/null
}
delta() {  # delta NAME: measure how far a translator moves the weights
    [ -e "$DIR/$1.delta.json" ] || \
        $PY diag.py delta "$DIR/$1/adapter_model.safetensors" --json "$DIR/$1.delta.json" > /dev/null
}
encoder() { echo --text_encoder "$DIR/$1/text_encoder.safetensors"; }
adapter() { echo --lora "$DIR/$1/adapter_model.safetensors"; }

use() {  # use SEED: set the seed's folder, clips and words
    SEED=$1 DIR=$OUT/$1 KEYS=$WORDS DATA=$OUT/$1/clips
    mkdir -p "$DIR"
    [ -d "$DATA" ] || $PY -m nano clips --out "$DATA" --n 1200 --seed "$((70 + SEED))" --words $WORDS
}
main_line() {
    use "$1"
    score base
    te te;                                          score te $(encoder te)
    lora te_lora $(encoder te);                     score te_lora $(encoder te) $(adapter te_lora); delta te_lora
}
claims() {
    use "$1"
    te te_short --steps 200;                        score te_short $(encoder te_short)
    lora te_short_lora $(encoder te_short)
    score te_short_lora $(encoder te_short) $(adapter te_short_lora); delta te_short_lora
    lora lora;                                      score lora $(adapter lora); delta lora
    # rank 8 on q, k, v and o has as many parameters as rank 16 on k and v
    lora lora_cross --rank 8 --targets cross_attn.q,cross_attn.k,cross_attn.v,cross_attn.o
    score lora_cross $(adapter lora_cross); delta lora_cross
    lora lora_self --rank 8 --targets self_attn.q,self_attn.k,self_attn.v,self_attn.o --allow_self_attn
    score lora_self $(adapter lora_self);   delta lora_self
    te te_rows --train_blocks 0;                    score te_rows $(encoder te_rows)
    te te_anchor_0 --anchor 0;                      score te_anchor_0 $(encoder te_anchor_0)
    te te_anchor_1 --anchor 1;                      score te_anchor_1 $(encoder te_anchor_1)
    te te_mix --caption_mode_probs 15,35,50 --trim_prob 0.2;       score te_mix $(encoder te_mix)
}
orange() {  # a colour that the DiT has never drawn
    use "$1"
    KEYS=orange DATA=$DIR/clips_orange
    [ -d "$DATA" ] || $PY -m nano clips --out "$DATA" --n 240 --seed "$((80 + SEED))" --words orange
    N=100 score orange_base
    te orange_te --steps 400;                       N=100 score orange_te $(encoder orange_te)
    lora orange_te_lora $(encoder orange_te)
    N=100 score orange_te_lora $(encoder orange_te) $(adapter orange_te_lora); delta orange_te_lora
}

for part in ${PARTS:-main_line claims orange}; do
    for seed in $SEEDS; do
        while [ "$(jobs -r | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
        $part "$seed" &
    done
    wait
done
$PY runs/listen_table.py "$OUT" | tee "$OUT/table.md"
