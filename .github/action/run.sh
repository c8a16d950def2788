#!/usr/bin/env bash
# Runs $COMMAND under $RULES and $SCENARIO, and sets the outputs of the Action.
# `fault` gets its rights by sudo; the command and the report stay the caller's.
set -euo pipefail

words=(run --report "$REPORT")
[ -z "$SCENARIO" ] || words+=(-f "$SCENARIO")
[ -z "$SEED" ] || words+=(--seed "$SEED")
while IFS= read -r rule; do
    [ -z "$rule" ] || words+=(-r "$rule")
done <<< "$RULES"

# What an earlier run has left says nothing of this one.
rm -f "$REPORT/report.json"
status=0
fault "${words[@]}" -- bash -eo pipefail -c "$COMMAND" || status=$?

fired=false
# That a rule never fires may be accepted: `accepted` in docs/report.schema.json.
if [ -f "$REPORT/report.json" ] && python3 - "$REPORT/report.json" << 'END'; then
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    rules = json.load(file)["rules"]
sys.exit(not all(rule["fired"] or rule["accepted"] for rule in rules))
END
    fired=true
fi
printf '%s\n' "fired=$fired" "report=$REPORT" "exit-code=$status" >> "$GITHUB_OUTPUT"
exit "$status"
