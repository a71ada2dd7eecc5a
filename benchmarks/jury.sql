-- The judged rows of two jurors joined by the id of the reply, as `srlm jury`; the judgements are not read.
COPY (
  WITH one AS (
    SELECT * FROM read_json($first, format = 'newline_delimited', columns = {
      id: 'VARCHAR', prompt: 'VARCHAR', source: 'VARCHAR', try: 'BIGINT', prompt_id: 'VARCHAR', response: 'VARCHAR',
      k: 'BIGINT', finish_reason: 'VARCHAR', model: 'VARCHAR', score: 'DOUBLE',
      judge: 'STRUCT(model VARCHAR, template VARCHAR, template_hash VARCHAR)'})
  ), two AS (
    SELECT * FROM read_json($second, format = 'newline_delimited', columns = {
      id: 'VARCHAR', score: 'DOUBLE', judge: 'STRUCT(model VARCHAR, template VARCHAR, template_hash VARCHAR)'})
  )
  SELECT one.* EXCLUDE (score, judge), list_avg([one.score, two.score]) AS score,
    [one.score, two.score] AS scores, {model: 'jury', jurors: [one.judge, two.judge]} AS judge
  FROM one LEFT JOIN two USING (id)
) TO $out (FORMAT json);
