"""Quantize a LLaMA or one of its relatives block by block and evaluate zero-shot tasks of lm-evaluation-harness.

python main.py meta-llama/Llama-2-7b-hf --tasks piqa,arc_easy,boolq,copa --table_results --method full
python main.py meta-llama/Llama-2-7b-hf --calib_data c4 --tasks piqa,copa --table_results --wbits 4 --act_bits 8 --method awrq --smooth
python main.py demo/llama --data_dir demo/data --calib_data world --eval world --tasks demo/tasks/world_deed.yaml --wbits 4 --method awrq
"""

from functools import partial

from run import cli

main = partial(cli.main, "main.py", __doc__, smallest_scale=0.01, corpora="")

if __name__ == "__main__":
    main()
