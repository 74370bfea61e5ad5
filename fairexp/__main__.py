from fairexp.cli import main

raise SystemExit(main())
