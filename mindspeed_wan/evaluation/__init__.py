"""Looking at what a model makes: metrics, the seed's score with its rating sheet, HTML reports.

metrics     PSNR, SSIM, MS-SSIM, flicker, motion of frame arrays   compare   several models, with references or without
learned     scores by networks from local folders                  score     the weighted score, the four human criteria
run_report  one page about training runs                           html      the pages: comparison, rating sheet
charts      curves, bars and histograms as SVG                     acceleration  what faster generation costs
prompts     what a clip was asked for                              output   tables and pages on their way to disk
"""
