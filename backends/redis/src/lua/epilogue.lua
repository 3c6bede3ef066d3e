reap()
local reply = main()
tell()
return reply
