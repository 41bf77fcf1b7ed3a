# The commands of docs/fine-tune.md of LLM-Embedder (MIT), to the letter; test_guide.py runs them.

torchrun --nproc_per_node=8 run_dense.py \
--output_dir data/outputs/nq/contrastive \
--train_data llm-embedder:qa/nq/train.json \
--eval_data llm-embedder:qa/nq/test.json \
--corpus llm-embedder:qa/nq/corpus.json \
--metrics nq \
--key_max_length 128 \
--query_max_length 32 \
--max_steps 2000

torchrun --nproc_per_node=8 run_dense.py \
--output_dir data/outputs/icl/distill \
--train_data llm-embedder:icl/icl/train.scored.llama2-chat.top20.json \
--max_steps 6000 \
--save_steps 6000 \
--add_instruction false \
--select_positive random \
--contrastive_weight 0 \
--stable_distill

torchrun --nproc_per_node=8 run_dense.py \
--output_dir data/outputs/lrlm/distill \
--train_data llm-embedder:lrlm/books3/train.128tok.scored.llama2-7b-chat.json llm-embedder:lrlm/arxiv/train.128tok.scored.llama2-7b-chat.json llm-embedder:lrlm/codeparrot/train.128tok.scored.llama2-7b-chat.json \
--select_positive teacher \
--select_negative random \
--teacher_scores_margin 0.1 \
--contrastive_weight 0 \
--teacher_temperature 0.1 \
--save_steps 4000 \
--max_steps 4000 \
--learning_rate 5e-6

torchrun --nproc_per_node=8 run_dense.py \
--output_dir data/outputs/msc/distill \
--train_data llm-embedder:chat/msc/train.scored.llama2-7b-chat.json \
--select_positive teacher \
--select_negative random \
--contrastive_weight 0 \
--teacher_temperature 0.1 \
--max_steps 4000 \
--save_steps 4000 \
--learning_rate 5e-6

torchrun --nproc_per_node=8 run_dense.py \
--output_dir data/outputs/tool/contrastive \
--train_data llm-embedder:tool/toolbench/train.hardneg.json \
--eval_data llm-embedder:tool/toolbench/test.json \
--corpus llm-embedder:tool/toolbench/corpus.json \
--save_steps 2000 \
--max_steps 2000 \
--key_template {text} \
--metrics ndcg

torchrun --nproc_per_node=8 run_dense.py \
--output_dir data/outputs/qrecc/contrastive-concat-from-bm25-human \
--train_data llm-embedder:conversation/qrecc/train.concat.neg.bm25-from-human.json \
--metrics mrr ndcg \
--cutoffs 3 10 100 \
--max_steps 2000 \
--key_template '{text}'

torchrun --nproc_per_node=8 -m evaluation.eval_retrieval \
--eval_data llm-embedder:qa/nq/train.json \
--corpus llm-embedder:qa/nq/corpus.json \
--metrics mrr recall collate_neg \
--save_name bge

torchrun --nproc_per_node 8 -m evaluation.eval_retrieval \
--retrieval_method bm25 \
--eval_data llm-embedder:qa/nq/train.json \
--corpus llm-embedder:qa/nq/corpus.json \
--metrics mrr recall collate_neg \
--save_name bm25

torchrun --nproc_per_node=8 run_lm_score.py --eval_data llm-embedder:qa/msmarco/train.json
