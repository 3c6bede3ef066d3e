-- ARGV: lease.
local function main()
  end_lease(ARGV[1])
  return 1
end
