# Sourced by runs/listen.sh and runs/claims.sh, which set PY, DIR and SEED.

train_once() {  # train_once NAME COMMAND...: train into DIR/NAME; continue a stopped run, leave a finished run alone
    [ -e "$DIR/$1/done" ] && return
    local resume=
    if compgen -G "$DIR/$1/checkpoints/step_*.pt" > /dev/null; then resume=--resume; fi
    $PY "${@:2}" --out "$DIR/$1" --seed "$SEED" $resume > "$DIR/$1.log"
    grep -q "^peak memory" "$DIR/$1.log" || exit 130  # the run was stopped
    touch "$DIR/$1/done"
}
