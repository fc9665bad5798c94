"""Quantize an OPT model block by block and print its perplexity on WikiText2, PTB and C4.

python opt.py facebook/opt-125m --method full
python opt.py facebook/opt-125m --calib_data c4 --wbits 4 --act_bits 8 --method awrq --smooth --alpha 0.50 --min 0.10
python opt.py demo/opt --data_dir demo/data --calib_data world --eval world --wbits 4 --method awrq
"""

from functools import partial

from run import cli

main = partial(cli.main, "opt.py", __doc__, smallest_scale=0.1, corpora="wikitext2,ptb,c4")

if __name__ == "__main__":
    main()
