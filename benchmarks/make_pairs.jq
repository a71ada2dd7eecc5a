# Best against worst of the rows that stand together, as `srlm make-pairs`: jq -nc -f make_pairs.jq judged.jsonl
def pair:
  map(select(.score != null)) | select(length > 1)
  | max_by(.score) as $chosen | min_by(.score) as $rejected
  | select($chosen.score != $rejected.score and $chosen.response != $rejected.response)
  | {id: $chosen.prompt_id, prompt: [{role: "user", content: $chosen.prompt}],
     chosen: [{role: "assistant", content: $chosen.response}],
     rejected: [{role: "assistant", content: $rejected.response}],
     prompt_id: $chosen.prompt_id, score_chosen: $chosen.score, score_rejected: $rejected.score,
     chosen_id: $chosen.id, rejected_id: $rejected.id};

foreach (inputs, null) as $row ({group: [], whole: []};
  if $row != null and (.group == [] or .group[0].prompt_id == $row.prompt_id)
  then {group: (.group + [$row]), whole: []}
  else {group: [$row], whole: .group} end;
  .whole | select(. != []) | pair)
