# M1 to M3 by the model's own judgement, and beside it a control: the same rounds with chosen and rejected dealt at random. A
# program checks the replies to held-out prompts; it only measures. Included by rules/Makefile and facts/Makefile, which set
#
#   TASK       name of the run's folder
#   BUILD      options of build.py
#   HELD       the held-out prompts: data/$(HELD).jsonl
#   RANKED     held-out texts, for the judge's agreement with the program
#   UNTRAINED  all prompts that no training may have, for --held-out
#   JUDGE      options of judge and make-eft
#   NEEDS      files that the judge needs
#   TEMPLATE   the judge's template
#   ROUND      options of sample for the prompts of a round
#
# LIMIT=4 reads at most 4 records of each file that is answered or judged: to try a model or settings.

SRLM ?= ../../.venv/bin/srlm
PYTHON ?= ../../.venv/bin/python
CONFIG ?= srlm.toml
M0 ?= smollm2-135m-instruct
SEED ?= 0
LAST ?= 3
LIMIT ?=
OUT ?= ../../runs/$(TASK)$(LIMIT:%=-limit-%)/seed-$(SEED)

ROWS := --config $(CONFIG) --on-stale restart --seed $(SEED)
DATA := $(OUT)/data
BUILT := $(DATA)/test.jsonl
TRAIN := $(ROWS) $(UNTRAINED:%=--held-out $(DATA)/%.jsonl)
SOME := $(LIMIT:%=--limit %)
LATER := $(shell seq 2 $(LAST))
MODELS := own/M0 own/M1 $(LATER:%=own/M%) $(LATER:%=control/M%)

.PHONY: all
.SECONDARY:
.DELETE_ON_ERROR:

all: $(MODELS:%=$(OUT)/%/eval-rules.jsonl) $(patsubst %,$(OUT)/%/eval-reward.jsonl,$(filter own/%,$(MODELS)))
	$(SRLM) report $(OUT)/own --control $(OUT)/control --config $(CONFIG)

$(BUILT): build.py
	$(PYTHON) build.py $(BUILD) --out $(@D) --seed $(SEED)

# --- M1: it learns the form of a reply (IFT), and to judge right and wrong texts (EFT) --------------------------------
$(OUT)/eft.jsonl: $(BUILT) $(CONFIG) $(TEMPLATE) $(NEEDS)
	$(SRLM) make-eft $(ROWS) $(SOME) $(JUDGE) --in $(DATA)/ranked.jsonl --out $@

$(OUT)/own/M1/model/provenance.json: $(OUT)/eft.jsonl
	$(SRLM) sft $(TRAIN) --in $(DATA)/ift.jsonl --in $(OUT)/eft.jsonl --model $(M0) --out $(@D)

# --- one round: Mt answers and judges; M(t+1) learns from the pairs --------------------------------------------------
# Arm, t, and the model Mt. Both arms begin with the same answers and judgements of M1.
define answers
$(OUT)/$(1)/M$(2)/responses.jsonl: $(3)/provenance.json
	@mkdir -p $$(@D)
	$(SRLM) sample $(ROWS) $(SOME) $(ROUND) --in $(DATA)/round-$(2).jsonl --model $(3) --out $$@

$(OUT)/$(1)/M$(2)/judged.jsonl: $(OUT)/$(1)/M$(2)/responses.jsonl
	$(SRLM) judge $(ROWS) $(JUDGE) --in $$< --out $$@
endef

# Arm, t, t+1, the model Mt, the arm whose judgements are paired, and options for the pairs.
define learns
$(OUT)/$(1)/M$(2)/pairs.jsonl: $(OUT)/$(5)/M$(2)/judged.jsonl
	@mkdir -p $$(@D)
	$(SRLM) make-pairs $(ROWS) --in $$< $(6) --out $$@

$(OUT)/$(1)/M$(3)/model/provenance.json: $(OUT)/$(1)/M$(2)/pairs.jsonl
	$(SRLM) dpo $(TRAIN) --in $$< --model $(4) --out $$(@D)
endef

before = $(shell echo $$(($(1) - 1)))
M1 := $(OUT)/own/M1/model
$(eval $(call answers,own,1,$(M1)))
$(foreach t,$(filter-out $(LAST),$(LATER)),$(foreach arm,own control,$(eval $(call answers,$(arm),$(t),$(OUT)/$(arm)/M$(t)/model))))
$(eval $(call learns,own,1,2,$(M1),own))
$(eval $(call learns,control,1,2,$(M1),own,--shuffle-labels))
$(foreach t,$(filter-out 2,$(LATER)),$(eval $(call learns,own,$(call before,$(t)),$(t),$(OUT)/own/M$(call before,$(t))/model,own)))
$(foreach t,$(filter-out 2,$(LATER)),$(eval $(call learns,control,$(call before,$(t)),$(t),$(OUT)/control/M$(call before,$(t))/model,control,--shuffle-labels)))

# --- measured on held-out prompts: the rules that a model keeps, and its judgements of texts -------------------------
define measure
$(OUT)/$(1)/eval-rules.jsonl: $(3)
	@mkdir -p $$(@D)
	$(SRLM) sample $(ROWS) $(SOME) --in $(DATA)/$(HELD).jsonl --model $(2) --out $(OUT)/$(1)/eval-rule-responses.jsonl
	$(SRLM) eval rules --config $(CONFIG) --in $(OUT)/$(1)/eval-rule-responses.jsonl --out $$@

$(OUT)/$(1)/eval-reward.jsonl: $(3) $(NEEDS)
	@mkdir -p $$(@D)
	$(SRLM) judge $(ROWS) $(SOME) $(JUDGE) --in $(DATA)/$(RANKED).jsonl --model $(2) --out $(OUT)/$(1)/eval-judged.jsonl
	$(SRLM) eval reward --config $(CONFIG) --in $(OUT)/$(1)/eval-judged.jsonl --out $$@
endef
$(eval $(call measure,own/M0,$(M0),$(BUILT)))
$(foreach model,$(filter-out own/M0,$(MODELS)),$(eval $(call measure,$(model),$(OUT)/$(model)/model,$(OUT)/$(model)/model/provenance.json)))
