#!/usr/bin/env bash
# Measure how small a translator can be, which blocks and linears it needs, and what else it changes, on nano with three
# seeds (docs/experiments.md). A cell is one training with its measurement. A cell takes some minutes. Everything takes
# a night on two cores, including half an hour for the base of `thirds`. A stopped run continues where it was.
#   bash runs/claims.sh                                  everything
#   PARTS=rank SEEDS=0 bash runs/claims.sh               one part, one seed
#   PARTS=rank CELLS=rank_4 SEEDS=0 bash runs/claims.sh  one cell
# Writes out/claims/SEED/NAME.json, the table out/claims/table.md, and out/claims/budget.png, a plot of
# accuracy against dW/W. The part `thirds`, which has its own base, writes its results and table to out/claims/thirds.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python} OUT=${OUT:-out/claims} SEEDS=${SEEDS:-"0 1 2"} CELLS=${CELLS:-}
WORDS=crimson,azure,wedge,plus,sinks,halts
CROSS=cross_attn.q,cross_attn.k,cross_attn.v,cross_attn.o SELF=${CROSS//cross/self} FFN=ffn.0,ffn.2
CKPT=nano
if [ -n "$CELLS" ] && [ -z "${PARTS:-}" ]; then echo "CELLS=$CELLS: say in PARTS of which part" >&2 && exit 2; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # two seeds in parallel are faster than two threads
source runs/train_once.sh

asked() { [ -z "$CELLS" ] || [[ " $CELLS " == *" $1 "* ]]; }
clips() {  # clips NAME N: draw N clips, half of them with one of the words
    [ -d "$DIR/$1" ] || $PY -m nano clips --out "$DIR/$1" --n "$2" --seed "$((70 + SEED))" --words $WORDS > /dev/null
}
words() { sed 's/=[^,]*//g' <<< "$WORDS"; }  # the words without their meanings
measure() {  # measure NAME FLAGS...
    $PY runs/claims.py score "$DIR" "$1" --ckpt "$CKPT" --words $WORDS --n "${N:-34}" \
        --seed "$((1000 + SEED))" "${@:2}"
}
score() { [ -e "$DIR/$1.json" ] || measure "$@"; }

te() {  # te NAME CLIPS FLAGS...: train and measure an encoder
    asked "$1" || return 0
    train_once "$1" train_te.py --ckpt "$CKPT" --data "$DIR/$2" --keywords "$(words)" "${@:3}"
    score "$1" --text_encoder
}
lora() {  # lora NAME FLAGS...: train and measure a translator on top of te_rows, whose accuracy it can still raise
    asked "$1" || return 0
    base_encoder
    train_once "$1" train_lora.py --ckpt "$CKPT" --data "$DIR/clips" --text_encoder "$ENCODER" --trigger $WORDS "${@:2}"
    score "$1" --lora "$ENCODER"
}
base_encoder() {  # train te_rows: the embeddings of the words alone, so that everything else stays as it was
    train_once te_rows train_te.py --ckpt "$CKPT" --data "$DIR/clips" --keywords $WORDS --train_blocks 0 \
        --keyword_init own --keyword_lr 0.1 --trim_prob 0
}

start() {
    base_encoder
    ! asked base || score base
    ! asked te_rows || score te_rows --text_encoder
}
rank() { for r in 1 4 16 64; do lora "rank_$r" --rank $r; done; }
targets() {  # other targets, each with as many parameters as rank 16 on k and v
    lora targets_k --rank 32 --targets cross_attn.k
    lora targets_v --rank 32 --targets cross_attn.v
    lora targets_qkvo --rank 8 --targets "$CROSS"
    lora targets_ffn --rank 13 --targets "$FFN"
    lora targets_all --rank 3 --targets "$SELF,$CROSS,$FFN" --allow_self_attn
}
blocks() {  # translators in some of nano's four blocks
    lora blocks_0-1 --blocks 0-1
    lora blocks_1-2 --blocks 1-2
    lora blocks_2-3 --blocks 2-3
    lora blocks_3 --blocks 3
}
deep_nano() {  # a nano with twelve blocks, for `thirds`
    [ -e "$OUT/thirds/nano/config.json" ] || \
        OMP_NUM_THREADS=$(nproc) $PY -m nano train --layers 12 --vae nano --steps 5000 --out "$OUT/thirds/nano"
}
thirds() {  # translators in each third of twelve blocks
    CKPT=$OUT/thirds/nano
    start
    lora all
    lora lower --blocks 0-3
    lora middle --blocks 4-7
    lora upper --blocks 8-11
}
cap() { for c in 0.02 0.05 0.1 0.2 0.5; do lora "cap_$c" --delta_cap $c; done; }
preserve() {  # with twice the steps, since half of the samples get a prompt to preserve and teach no new word
    for w in 1 2 4; do lora "preserve_$w" --preserve $w --steps 800; done
}
mix() {
    te mix_15_35_50 clips --caption_mode_probs 15,35,50
    te mix_0_0_100 clips --caption_mode_probs 0,0,100
    te mix_50_50_0 clips --caption_mode_probs 50,50,0
}
count() {  # the number of clips per word
    for n in 5 20 80; do
        clips "clips_$n" $((12 * n))
        te "count_$n" "clips_$n"
    done
}
own_words() {  # a user's own words, with 20 clips each
    WORDS=scarlet=red,navy=blue,disc=circle,pyramid=triangle,plummets=down,freezes=still
    clips own_clips 240
}
parts() {  # how much of the encoder is trained: all of it, LoRAs in its blocks, or the words' embeddings alone
    own_words
    te own own_clips
    for r in 4 16 64; do te "own_rank_$r" own_clips --rank $r --lr 1e-3; done
    te own_rows own_clips --train_blocks 0
}
norm() {  # the norm of the words' embeddings, if these alone are trained
    own_words
    clips own_few 60
    for how in free fixed clamp; do
        te "norm_${how}_5" own_few --train_blocks 0 --keyword_norm $how
        te "norm_${how}_20" own_clips --train_blocks 0 --keyword_norm $how
    done
}
rates() {  # other learning rates, in half decades, for comparison with rank_16, own, own_rank_16 and own_rows
    for lr in 1e-3 1e-2; do lora "rate_lora_$lr" --lr $lr; done
    own_words
    te rate_blocks_1e-3 own_clips --lr 1e-3
    for lr in 3e-4 3e-3 1e-2; do te "rate_rank_$lr" own_clips --rank 16 --lr $lr; done
    for lr in 3e-3 3e-2; do te "rate_rows_$lr" own_clips --train_blocks 0 --keyword_lr $lr; done
}
undrawn() {  # a colour and a motion that the base has never drawn: by encoder, by LoRA, and by both
    WORDS=orange,bounces=bounce
    clips undrawn_clips 240
    ! asked undrawn_base || score undrawn_base
    undrawn_rows
    ! asked undrawn_rows || score undrawn_rows --text_encoder
    te undrawn_te undrawn_clips
    local all="--targets $SELF,$CROSS,$FFN --allow_self_attn"
    for with in alone rows; do
        undrawn_lora $with kv
        undrawn_lora $with all_16 $all
        undrawn_lora $with all_16_long $all --steps 1200
    done
    undrawn_lora rows kv_long --steps 1200  # the next three have as many parameters as rank 16 on k and v
    undrawn_lora rows self --rank 8 --targets "$SELF" --allow_self_attn
    undrawn_lora rows ffn --rank 13 --targets "$FFN"
    undrawn_lora rows all_3 --rank 3 $all
}
undrawn_rows() {  # train the embeddings of the two words alone
    train_once undrawn_rows train_te.py --ckpt "$CKPT" --data "$DIR/undrawn_clips" --keywords "$(words)" --train_blocks 0
}
undrawn_lora() {  # undrawn_lora alone|rows NAME FLAGS...: a LoRA alone, or one on the output of undrawn_rows
    local name=undrawn_$1_$2 encoder=$DIR/undrawn_rows/text_encoder.safetensors
    asked "$name" || return 0
    if [ "$1" = rows ]; then undrawn_rows; else encoder=; fi
    train_once "$name" train_lora.py --ckpt "$CKPT" --data "$DIR/undrawn_clips" --trigger "$(words)" \
        ${encoder:+--text_encoder "$encoder"} "${@:3}"
    score "$name" --lora ${encoder:+"$encoder"}
}
fast() {  # what is left of words and translators on a nano that was distilled to four steps
    lora rank_16 --rank 16
    score_fast base
    score_fast te_rows --text_encoder
    score_fast rank_16 --lora "$ENCODER"
}
score_fast() { [ -e "$DIR/$1_fast.json" ] || measure "$1" --fast "$OUT/fast.safetensors" "${@:2}"; }
own() {  # an encoder with default flags, one with embeddings alone, and a translator without and with --preserve
    own_words
    te own own_clips
    te own_rows own_clips --train_blocks 0
    own_lora own_lora
    own_lora own_preserve --preserve 2 --steps 800
}
own_lora() {  # own_lora NAME FLAGS...: train and measure a translator on top of the encoder `own`
    asked "$1" || return 0
    local encoder=$DIR/own/text_encoder.safetensors
    train_once own train_te.py --data "$DIR/own_clips" --keywords "$(words)"
    train_once "$1" train_lora.py --data "$DIR/own_clips" --text_encoder "$encoder" --trigger "$(words)" "${@:2}"
    score "$1" --lora "$encoder"
}

for part in ${PARTS:-start preserve rank cap blocks targets mix count own parts norm rates undrawn fast thirds}; do
    folder=$OUT
    if [ "$part" = thirds ]; then folder=$OUT/thirds && deep_nano; fi
    if [ "$part" = fast ] && [ ! -e "$OUT/fast.safetensors" ]; then $PY runs/distill.py "$OUT/fast.safetensors"; fi
    for seed in $SEEDS; do
        while [ "$(jobs -r | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done
        (
            SEED=$seed DIR=$folder/$seed ENCODER=$folder/$seed/te_rows/text_encoder.safetensors
            mkdir -p "$DIR"
            clips clips 1200
            $part
        ) &
    done
    wait
done
$PY runs/claims.py table "$OUT" | tee "$OUT/table.md"
$PY runs/claims.py plot "$OUT" "$OUT/budget.png"
if [ -d "$OUT/thirds" ]; then $PY runs/claims.py table "$OUT/thirds" | tee "$OUT/thirds/table.md"; fi
