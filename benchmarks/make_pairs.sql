-- Best against worst of the rows of each prompt, as `srlm make-pairs`; only the columns that a pair needs are read.
COPY (
  WITH scored AS (
    SELECT * FROM read_json($judged, format = 'newline_delimited', columns = {
      id: 'VARCHAR', prompt: 'VARCHAR', prompt_id: 'VARCHAR', response: 'VARCHAR', score: 'DOUBLE'})
    WHERE score IS NOT NULL
  ), ends AS (
    SELECT prompt_id, any_value(prompt) AS prompt, count(*) AS n,
      arg_max({id: id, response: response, score: score}, score) AS best,
      arg_min({id: id, response: response, score: score}, score) AS worst
    FROM scored GROUP BY prompt_id
  )
  SELECT prompt_id AS id, [{role: 'user', content: prompt}] AS prompt,
    [{role: 'assistant', content: best.response}] AS chosen,
    [{role: 'assistant', content: worst.response}] AS rejected,
    prompt_id, best.score AS score_chosen, worst.score AS score_rejected, best.id AS chosen_id, worst.id AS rejected_id
  FROM ends WHERE n > 1 AND best.score <> worst.score AND best.response <> worst.response
) TO $pairs (FORMAT json);
