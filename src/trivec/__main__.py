from trivec.cli import main

main()
