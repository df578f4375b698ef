"""Looking at what a model makes: metrics, the seed's score with its rating sheet, HTML reports.

metrics   PSNR, SSIM, MS-SSIM, flicker, motion of frame arrays   compare   several models on one set of references
score     the weighted score and the four human criteria         html      the pages: comparison, rating sheet
run_report  one page about training runs
"""
