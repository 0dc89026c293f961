"""Documents: from a file of any kind to text that knows its pages.

reading     a file, or standard input, to a Document: the door of this folder
document    Document and Place
extract     what each format gives
sniff       what kind of file some bytes are
plain       text and Markdown; read in this process
parsing     starts `worker`, which reads the kinds below in a process of its own
pdf epub html docx pptx xlsx odt odp ods rtf      one format each, in the worker
slides      PPTX and ODP; pptx_fonts: signs in PPTX
sheets      XLSX and ODS
docx_formulas docx_numbers       DOCX; odt_numbers: ODT; item_numbers: how both write a number
symbol_fonts                     what Symbol and Wingdings show, in Office files
styles      names of DOCX's and RTF's paragraph styles
opendocument opendocument_fonts  ODT, ODS and ODP
rtf_tokens rtf_text   RTF
archive     zip files, bounded
xml_tree    elements by their names
html_text   XHTML to text
page_ranges what `--pages` says
split       a long document in parts
citations   quoted words, looked up in the document
limits      how much of anything is read
"""
